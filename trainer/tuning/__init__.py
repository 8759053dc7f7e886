"""Finding a learning rate and a batch size, leaving no trace."""
