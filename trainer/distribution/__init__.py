"""Several processes: which of them this one is, how they are started, and how they communicate."""
