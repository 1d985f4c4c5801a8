"""A bench's report: its data, and its HTML, Markdown and terminal forms."""
