"""The built-in demo: a tiny model (``model/``) and the task that it has half learnt (``addition``)."""
