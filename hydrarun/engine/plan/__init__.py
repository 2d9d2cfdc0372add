"""What a run would take, before its weights are read: memory, time, and the settings that fit."""
