//! Links the addon: Node brings the symbols of Node-API.

fn main() {
    napi_build::setup();
}
