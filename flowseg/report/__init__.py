"""The demo's report: figures, the speed table, and the page that holds them."""
