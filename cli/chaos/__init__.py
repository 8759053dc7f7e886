"""`flashtask chaos`: faults injected into training runs of this machine, and what became of them."""
