"""What a run did: collected, printed, drawn, and written as JSON, CSV, PNG and one HTML page."""
