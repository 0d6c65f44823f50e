"""The first half of an iteration: a rank's part of the trees, drawn, searched and scored."""
