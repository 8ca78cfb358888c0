"""Text to train on: files or hub datasets as an endless stream of packed token rows, resumable to the row. No torch.

``settings`` what a recipe says; ``documents`` one text; ``readers`` and ``sources`` where documents come from;
``shuffling`` their order; ``encoding`` texts as tokens; ``mixture`` whose turn it is; ``packing`` tokens as rows;
``stream`` all of it; ``held_out`` what is never trained on.
"""
