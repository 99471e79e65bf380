"""The few coarse operations that a model pass is written in, one implementation per device."""
