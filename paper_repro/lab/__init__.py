"""The lab: small multi-domain RL worlds that train in minutes on two cores (`python -m paper_repro.lab build`)."""
