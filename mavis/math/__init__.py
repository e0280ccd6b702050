"""Pure tensor functions: the formulas of the project, torch only."""
