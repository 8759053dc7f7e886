"""From folders, tables and archives to data modules: reading, splitting, checking and transforming images."""
