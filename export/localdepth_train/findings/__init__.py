"""What the field says of retrofits, tried again on small models: one command for each claim, several seeds.

python -m localdepth_train.findings pretrained -o runs/findings
python -m localdepth_train.findings retrofit -o runs/findings --base BASE --text FILE
"""
