"""Finetuning: phases as data, named strategies, what they freeze in a module, LoRA, and the plan of a run."""
