"""What a model wears: LoRAs and textual inversions, in the forms that other tools read."""
