// A small, safe subset of Markdown: code blocks, headings, lists, paragraphs, inline code, bold, italic. Builds nodes; never parses HTML.

export function render(text) {
  const fragment = document.createDocumentFragment();
  const parts = text.split(/^```[^\n]*\n?/m);
  parts.forEach((part, index) => {
    if (index % 2 === 1) fragment.append(codeBlock(part));
    else blocks(part).forEach((node) => fragment.append(node));
  });
  return fragment;
}

function codeBlock(text) {
  const pre = document.createElement("pre");
  const code = document.createElement("code");
  code.textContent = text.replace(/\n$/, "");
  pre.append(code);
  return pre;
}

const ITEM = /^\s*(?:[-*+]|\d{1,3}[.)])\s+/;
const HEADING = /^#{1,6}\s+/;

// Runs of lines of one kind become one node: list items a list, other lines a paragraph; a heading stands alone.
function blocks(text) {
  const nodes = [];
  let open = null;
  for (const line of text.split("\n")) {
    const kind = !line.trim() ? null : HEADING.test(line) ? "heading" : ITEM.test(line) ? (/^\s*\d/.test(line) ? "ol" : "ul") : "p";
    if (kind === null) {
      if (open?.tagName === "P") open = null;
    } else if (kind === "heading") {
      const heading = document.createElement("h3");
      inline(heading, line.replace(HEADING, ""));
      nodes.push(heading);
      open = null;
    } else if (kind === "p") {
      const isList = open && open.tagName !== "P";
      const indented = /^\s{2,}/.test(line);
      if (isList && indented) {
        inline(open.lastChild, ` ${line.trim()}`);
        continue;
      }
      if (!open || isList) nodes.push((open = document.createElement("p")));
      else open.append("\n");
      inline(open, line);
    } else {
      if (open?.tagName !== kind.toUpperCase()) {
        nodes.push((open = document.createElement(kind)));
        if (kind === "ol") open.start = Number.parseInt(line, 10);
      }
      const item = document.createElement("li");
      inline(item, line.replace(ITEM, ""));
      open.append(item);
    }
  }
  return nodes;
}

function inline(parent, text) {
  for (const piece of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*|\*[^*\s][^*\n]*\*)/)) {
    if (/^`.+`$/.test(piece)) parent.append(element("code", piece.slice(1, -1)));
    else if (/^\*\*.+\*\*$/.test(piece)) parent.append(element("strong", piece.slice(2, -2)));
    else if (/^\*.+\*$/.test(piece)) parent.append(element("em", piece.slice(1, -1)));
    else if (piece) parent.append(piece);
  }
}

function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}
