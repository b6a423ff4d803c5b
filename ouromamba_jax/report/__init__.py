"""What results look like: tables, figures, charts."""
