"""Images and labels from folders, archives, tables and data set libraries."""
