"""Model files on this machine: the models folder, and getting models into it from the Hugging Face Hub."""
