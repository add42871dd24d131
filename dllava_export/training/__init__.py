"""Train predictors, or a plain LLaVA, on conversations about images."""
