"""Infrastructure of a run: processes, progress on disk, memory, optimization, patches that undo themselves."""
