"""What is here only for scripts and habits from Lightning 1.x: old argument names, argparse, loops as objects."""
