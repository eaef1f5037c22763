"""The main job, shown: five tenants, several hundred reconciliations, and a check of the outcome against the log."""
