"""Describe the whole public API: as an OpenAPI document made from the routes and their types, and as a page for people.

Owns:        nothing
Enter at:    document.make_document, views.show_document, views.show_docs
May import:  apps.gateway.endpoints and its types; aiscale.errors
Invariant:   what is documented is what is served: parameters come from the types that read them, and tests hold answers against shapes
Hot path:    none: made once a process
If it fails: the API is served all the same
"""
