-- A notebook of pandoc's as Quarto lays it out: cells and outputs under its names,
-- code that a cell hides left out, code that it folds folded.

local function option(text, name)
  return text:match("#| *" .. (name:gsub("-", "%%-")) .. ": *([^\n]*)")
end

local function code(block)
  local hidden = option(block.text, "echo") == "false"
  local fold, summary = option(block.text, "code-fold"), option(block.text, "code-summary")
  block.text = block.text:gsub("#|[^\n]*\n?", ""):gsub("^\n+", "")
  if hidden or block.text == "" then
    return {}
  end
  block.classes = { "python", "cell-code" }
  if not fold then
    return { block }
  end
  local open = fold == "show" and " open" or ""
  local head = '<details class="code-fold"' .. open .. "><summary>"
  summary = summary and summary:gsub('"', "") or "Code"
  return {
    pandoc.RawBlock("html", head .. summary .. "</summary>"),
    block,
    pandoc.RawBlock("html", "</details>"),
  }
end

local function words(option)
  local text = option and option:gsub('^"(.*)"$', "%1")
  return text and pandoc.utils.blocks_to_inlines(pandoc.read(text).blocks)
end

-- What a figure shows, for who does not see it, and its caption.
local function figure(div, alt, caption)
  return div:walk({
    Para = function(p)
      local image = #p.content == 1 and p.content[1]
      if not image or image.t ~= "Image" then
        return nil
      end
      image.caption = words(alt) or image.caption
      image.classes:insert("img-fluid")
      caption = caption and { pandoc.Plain(words(caption)) } or {}
      return pandoc.Figure({ pandoc.Plain({ image }) }, { long = caption })
    end,
  })
end

local function cell(div)
  if div.classes:includes("markdown") then
    return div.content
  end
  local blocks, alt, caption = pandoc.List(), nil, nil
  for _, b in ipairs(div.content) do
    if b.t == "CodeBlock" then
      alt, caption = option(b.text, "fig-alt"), option(b.text, "fig-cap")
      blocks:extend(code(b))
    elseif b.t == "Div" and b.classes:includes("output") then
      local kind = b.classes:includes("stream") and "stdout" or "display"
      b.attr = pandoc.Attr("", { "cell-output", "cell-output-" .. kind })
      blocks:insert(figure(b, alt, caption))
    else
      blocks:insert(b)
    end
  end
  return pandoc.Div(blocks, pandoc.Attr("", { "cell" }))
end

function Div(div)
  if div.classes:includes("cell") then
    return cell(div)
  end
end

function Table(t)
  t.attr = pandoc.Attr(t.identifier, { "caption-top", "table" })
  return t
end

function Image(image)
  if not image.classes:includes("img-fluid") then
    image.classes:insert("img-fluid")
  end
  return image
end
