"""The engine: trains any `Module` on any `DataModule`. It has never heard of images or backbones."""
