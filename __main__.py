"""`python -m flashtask` is the `flashtask` command (torchrun starts it this way)."""

from flashtask.cli import main

if __name__ == "__main__":
    main()
