"""Numbers → pictures in SVG, and a page of HTML that needs nothing beside itself."""
