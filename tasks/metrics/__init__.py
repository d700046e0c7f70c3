"""What can be said of a set of images: distances, diversity, agreement with prompts."""
