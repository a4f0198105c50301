"""`interference forecast`: from RUN.yaml to tables of how every training would change every domain."""
