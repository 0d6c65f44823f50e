"""Trees: the plan of an iteration, and the choices that algorithms make about it."""
