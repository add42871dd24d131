"""What a bundle costs: FLOPs and KV bytes by formula, GPU memory from its graphs."""
