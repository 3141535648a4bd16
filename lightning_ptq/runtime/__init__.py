"""What a run stands on: processes, progress on disk, memory, patches that undo themselves."""
