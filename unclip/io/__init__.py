"""What is on disk: model folders and checkpoints, images and their metadata."""
