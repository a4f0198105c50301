"""The study of forecasts: many set-ups, each with real trainings, the forecasts made before them, and baselines.

`protocol.md` was fixed before the study was run; `python -m paper_repro.forecast_study run` and `score` make its tables.
"""
