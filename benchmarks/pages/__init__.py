"""The generated pages of the benchmarks, one per question; each module has a `page()` that returns Markdown."""
