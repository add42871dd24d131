"""Model families, one file each: what a checkpoint's configuration says, and what is traced."""
