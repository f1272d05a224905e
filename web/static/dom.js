// The page's elements: finding and making them, the fields of a form, and what went wrong.
// Text from the server is only ever set as textContent.

export const $ = (id) => document.getElementById(id);

/** Make an element: el("button", {className: "small", onclick}, "Stop"). */
export function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function svg(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

export function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

/** Run an action of the user; what goes wrong is shown. */
export async function act(action) {
  notice("");
  try {
    await action();
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message);
  }
}

/** Return a form's fields; empty ones are left out, numbers are numbers. */
export function fields(form) {
  const found = {};
  for (const input of form.elements) {
    if (!input.name || input.value === "") continue;
    found[input.name] = input.type === "number" ? Number(input.value) : input.value;
  }
  return found;
}
