"""Training as in the paper: recipes, data, objectives, and the loop that runs them: ``fastvit train``."""
