"""Files of the Hugging Face hub: a pinned commit, hashes that are compared, errors that name a fix."""
