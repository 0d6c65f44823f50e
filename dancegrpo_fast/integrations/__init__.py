"""Our step and loss in other people's trainers: one file per host, and `run` for host scripts."""
