"""Importers: other tools' preference formats into our records."""
