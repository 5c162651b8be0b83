"""What a site allows: its policy, its answer to a recipe, and what it checks of each job and message."""
