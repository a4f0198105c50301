"""`interference probe`: what models do. The request, its inputs, the stages that take time, the tables, the run."""
