//! What the Bookinfo services say: a book of 1595, its details, two reviews, and the page that shows them.

use serde_json::{Value, json};

use super::bookinfo::Called;

pub(super) fn details() -> Value {
    json!({
        "id": 0, "author": "William Shakespeare", "year": 1595, "type": "paperback", "pages": 200,
        "publisher": "PublisherA", "language": "English", "ISBN-10": "1234567890", "ISBN-13": "123-1234567890",
    })
}

pub(super) fn reviews() -> Vec<Value> {
    vec![
        json!({"reviewer": "Reviewer1", "text": "Every misunderstanding arrives a page before one expects it. Read it aloud."}),
        json!({"reviewer": "Reviewer2", "text": "The twins are easier to tell apart than the versions of this service."}),
    ]
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222}\
    h1{font-weight:600}table{border-collapse:collapse}td{padding:.2rem 1rem .2rem 0}section{margin:2rem 0}\
    blockquote{margin:1rem 0;padding-left:1rem;border-left:3px solid #ccc}.error{color:#b00}.stars{letter-spacing:.1em}\
    footer{color:#777;font-size:.85rem}";

fn frame(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )
}

pub(super) fn index() -> String {
    frame("Bookinfo", "<h1>Bookinfo</h1><p><a href=\"/productpage\">The product page</a></p>")
}

pub(super) fn product(pod: &str, details: &Called, reviews: &Called) -> String {
    let body = format!(
        "<h1>The Comedy of Errors</h1>\n<section><h2>Details</h2>{}</section>\n<section><h2>Reviews</h2>{}</section>\n\
         <footer>served by {}</footer>",
        details_html(details),
        reviews_html(reviews),
        escape(pod),
    );
    frame("Bookinfo: The Comedy of Errors", &body)
}

fn details_html(details: &Called) -> String {
    if details.status != 200 {
        return problem("details", details);
    }
    let rows = [
        ("Author", "author"),
        ("Year", "year"),
        ("Type", "type"),
        ("Pages", "pages"),
        ("Publisher", "publisher"),
        ("Language", "language"),
        ("ISBN-13", "ISBN-13"),
    ];
    let rows: String = rows
        .iter()
        .map(|(title, key)| format!("<tr><td>{title}</td><td>{}</td></tr>", text(&details.body[*key])))
        .collect();
    format!("<table>{rows}</table>")
}

fn reviews_html(reviews: &Called) -> String {
    if reviews.status != 200 {
        return problem("reviews", reviews);
    }
    let mut html = String::new();
    for review in reviews.body["reviews"].as_array().into_iter().flatten() {
        html += &format!("<blockquote>{}<br><small>{}</small>", text(&review["text"]), text(&review["reviewer"]));
        let rating = &review["rating"];
        if let Some(stars) = rating["stars"].as_u64() {
            let stars = usize::try_from(stars.min(5)).unwrap_or(0);
            let color = text(&rating["color"]);
            html += &format!(
                "<div class=\"stars\" style=\"color:{color}\">{}{}</div>",
                "★".repeat(stars),
                "☆".repeat(5 - stars)
            );
        }
        html += "</blockquote>";
    }
    html + &format!("<small>reviews {} ({})</small>", text(&reviews.body["version"]), text(&reviews.body["podname"]))
}

fn problem(service: &str, called: &Called) -> String {
    let reason = match &called.body["error"] {
        Value::String(reason) => escape(reason),
        _ => format!("status {}", called.status),
    };
    format!("<p class=\"error\">No {service} at the moment: {reason}</p>")
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => escape(text),
        other => escape(&other.to_string()),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_what_was_answered_and_what_was_not() {
        let details = Called { status: 200, body: details() };
        let reviews = Called { status: 0, body: json!({"error": "reviews.x:9080: refused: <connection>"}) };
        let page = product("pod-1", &details, &reviews);
        assert!(page.contains("William Shakespeare") && page.contains("refused: &lt;connection&gt;"), "{page}");
        let rated = json!({"version": "v3", "podname": "p", "reviews": [{"reviewer": "r", "text": "t", "rating": {"stars": 4, "color": "red"}}]});
        let page = product("pod-1", &details, &Called { status: 200, body: rated });
        assert!(page.contains("color:red") && page.contains("★★★★☆") && page.contains("reviews v3"), "{page}");
    }
}
