"""Features of frozen parts, computed once: when that is right, where they are kept, and how a run trains on them."""
