"""What a file or a bundle is, told without running anything of it."""
