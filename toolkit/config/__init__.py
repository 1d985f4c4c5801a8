"""What a run depends on: the recipe, its objective, class names and prompt templates, read and checked."""
