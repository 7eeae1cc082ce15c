"""What measurements of memories on models of transformers stand on."""
