"""What every room may use: errors, registry, zoo reader, seeding, state codec, safe files. Knows no other room."""
