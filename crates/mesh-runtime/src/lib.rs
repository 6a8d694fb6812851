//! The process around the mesh.
