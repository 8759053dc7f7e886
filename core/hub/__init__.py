"""What is fetched from the Hugging Face hub: addresses, checked files, errors that say what to do."""
