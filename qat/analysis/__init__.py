"""What finished runs show: reports, figures, comparisons, inspections. Nothing here trains."""
